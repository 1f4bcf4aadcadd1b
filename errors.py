"""What the system refuses, as a sentence that says what to do."""

import errno

import torch

MAKE_ROOM = "make room, then the same command goes on (train.py and infer.py with --resume)"
GIVE_LESS = (
    "give a smaller --batch-size or fewer --workers, then the same command goes on (train.py and "
    "infer.py with --resume)"
)
GET_RIGHT = "get the right to it, or give another path"
MOVE_FILE = "move away the file that is where a folder has to be, or give another path"
NO_MEMORY = (  # what torch, its libraries and Python say of it, all as RuntimeError
    "can't allocate memory",
    "could not create a",  # oneDNN's primitive or memory
    "can't start new thread",
    "DataLoader worker (pid",  # was killed, or found /dev/shm full
    "process pool was terminated abruptly",
)
CURES = {  # of what the system refuses
    errno.ENOSPC: MAKE_ROOM,
    errno.EDQUOT: MAKE_ROOM,
    errno.ENOMEM: GIVE_LESS,
    errno.EFBIG: "the system lets no file be so large",
    errno.EACCES: GET_RIGHT,
    errno.EPERM: GET_RIGHT,
    errno.EROFS: "give a path that can be written",
    errno.ENOTDIR: MOVE_FILE,
    errno.EEXIST: MOVE_FILE,
    errno.EISDIR: "move the folder away, or give another path",
}


def refused(error: OSError) -> str:
    """Return a sentence that names the file, says why it was refused, and what to do."""
    if not (error.filename and error.strerror):
        return str(error)
    cure = CURES.get(error.errno, "")
    return f"{error.filename}: {error.strerror}{cure and ': '}{cure}"


def no_memory(error: Exception) -> str:
    """Return what was said where memory ran out; "" where an error is of anything else."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    is_one = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return text[:160] if is_one or any(words in text for words in NO_MEMORY) else ""
