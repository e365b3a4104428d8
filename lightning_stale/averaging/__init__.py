"""HPSGD: local training on a replica while the average of the last changes is in flight (arXiv 2009.02701)."""
