"""What a setting makes of a pipeline: the schedule and staleness of ``DSPStrategy`` over given stage times."""
