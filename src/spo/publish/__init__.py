"""Publish a trained adapter: weights, card, licence and sample images."""
