"""The demo: a coordinator and three hospitals, each a process of its own on one machine, train one prompt together."""
