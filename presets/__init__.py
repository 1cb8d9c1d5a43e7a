"""Settings for people who know none of the techniques."""
