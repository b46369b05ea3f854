"""Numbers only: catalogue, schedules and one update; the only importer of torch."""
