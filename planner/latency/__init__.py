"""What a model on a device does under a load: step times, a simulated scheduler, sizing to an SLO."""
