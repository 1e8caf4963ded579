from vmf.memory.scattered import Ranges

def install(
    table: int,
    reset_slot: int,
    dirty_slot: int,
    store8: int,
    store16: int,
    store32: int,
    store64: int,
    reset: int,
    dirty: int,
    invalidate: int,
    ram_address: int,
    env_ptr: int,
    /,
) -> bool: ...
def attach(uc: int, env: int, modes: int, ram: int, size: int, /) -> bool: ...
def detach(env: int, /) -> None: ...
def written(env: int, offset: int, size: int, /) -> None: ...
def written_all(env: int, rows: Ranges, limit: int, /) -> bool: ...
def code_pages(env: int, /) -> int: ...
