"""Deliberation in latent space: a frozen decoder, and a coprocessor that augments its kv-cache."""
