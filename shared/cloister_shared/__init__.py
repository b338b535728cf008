"""What coordinator and hospital agree on: the plan, the wire, the budget, the tasks, the errors."""

import os

# Flower reads these when it is imported, and would phone home.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
