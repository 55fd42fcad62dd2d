"""Studies of accuracy on real data: ``snell study``. They need the ``bench`` extra."""

#: The tasks, and how many layers each uses unless asked otherwise.
TASKS = {"wordnet": 3, "debian": 3, "fashion": 4}
