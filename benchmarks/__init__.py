"""What the instrument costs, against the floor and against its peers; ``python -m benchmarks`` runs all of it."""
