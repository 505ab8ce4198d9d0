"""The VAE and its components: networks, priors, posteriors, likelihoods."""
