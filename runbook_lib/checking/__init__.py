"""What is looked at before anything is changed: inputs, rights, room, names, how the table is divided."""
