"""Networks that tasks are made of, and what each kind of outcome makes them minimise. The only torch in ``shared``."""
