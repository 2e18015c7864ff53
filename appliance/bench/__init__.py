"""The load generator behind `appliance bench`. Stands on asyncio and msgspec alone: `python -m appliance.bench` runs it from a bare checkout."""
