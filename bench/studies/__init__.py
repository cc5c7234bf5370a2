"""Research with pymcip: studies of storage and alignment, on drawn data and on photographs."""
