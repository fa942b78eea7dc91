compiler: str
built_with_torch: str
instruction_sets_built: list[str]
instruction_sets_usable: list[str]
instruction_set: str

def memory_budget() -> int: ...
def set_memory_budget(bytes: int) -> None: ...
