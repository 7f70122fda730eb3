"""How vector indexes are built, forecast and looked up, on an ordinary table and on partitions."""
