"""The tuner SNELL: its configuration, its layer and the model that puts layers in."""
