"""`fedrt-lab`: grids of experiments, settings x methods x seeds, each run by a real coordinator and real silos."""
