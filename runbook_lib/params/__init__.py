"""One YAML file per target, typed and checked whole before anything starts."""

from runbook_lib.params.model import Params as Params
from runbook_lib.params.reading import load as load
