"""Tools beside the product, run as `python -m tools.NAME`."""
