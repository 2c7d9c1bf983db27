"""The tests, a package so that they can share references and harnesses, here and in spawned processes."""
