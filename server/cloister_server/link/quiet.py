"""Imported before Flower: it reads its environment then, and phones home unless told not to."""

import logging
import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
logging.getLogger("alembic").setLevel(logging.WARNING)
