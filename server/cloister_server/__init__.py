"""The coordinator: invites hospitals, adds up their updates, never sees a patient's row."""
