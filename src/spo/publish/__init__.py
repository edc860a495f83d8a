"""What one uploads of a trained adapter: weights, card, licence and sample images."""
