"""One run from settings to summary: planning, labelling, dispatch, calibration, progress."""
