"""Every family's real class, tiny and with seeded weights, and the probe that finds which linear layers see text alone."""
