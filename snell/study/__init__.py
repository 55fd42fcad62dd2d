"""Studies of accuracy on real data: ``snell study``. They need the ``bench`` extra."""
