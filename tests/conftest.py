"""Settings for all tests."""

import os

# Scripts run by several tests or workers at once share two cores: threads that spin while they
# wait for each other would make that many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
