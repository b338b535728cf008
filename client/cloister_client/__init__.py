"""The hospital's agent: reads local records, trains under differential privacy, trusts nobody."""
