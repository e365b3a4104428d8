"""``startup`` is for the Pythons that the tests start, and not for that of the tests."""

collect_ignore = ["startup"]
