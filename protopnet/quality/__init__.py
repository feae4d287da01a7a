"""How far a bundle can be trusted: how often it is right, how well it is calibrated, what its explanations are worth."""
