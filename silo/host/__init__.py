"""Many virtual silos of one data set in one process: one CLIP, one cache of features, and a real session for each."""
