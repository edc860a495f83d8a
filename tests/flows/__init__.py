"""A package, so that a fixture of its scope, the Prefect server, ends with its last test."""
