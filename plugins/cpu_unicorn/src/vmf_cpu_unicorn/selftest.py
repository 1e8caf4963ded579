from vmf_cpu_unicorn.engine import Library
def verify(library: Library) -> None:
    pass
