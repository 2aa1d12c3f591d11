"""What things mean: shapes, spans, positions, the cache. Imports torch only."""
