"""What is wrong with settings, in one sentence for whoever wrote them."""

from pydantic import ValidationError

from mechgrok.task_config import TASKS


def one_sentence(error: ValidationError) -> str:
    """Every problem that pydantic found, each under the key of the file."""
    problems = []
    for problem in error.errors():
        path = problem["loc"]
        # After "task" and "train" stands which kind of it was read.
        path = (*path[:1], *path[2:]) if path[:1] in (("task",), ("train",)) else path
        key = ".".join(str(part) for part in path) or "settings"
        if problem["type"] == "extra_forbidden":
            problems.append(f"unknown key {key!r}; remove it or correct its spelling")
        elif problem["type"] == "string_pattern_mismatch":
            problems.append(f"{key} must be of letters, digits and ._- and not begin with these ({problem['input']!r})")
        elif problem["type"] == "missing":
            problems.append(f"missing key {key!r}; state its value")
        elif problem["type"].startswith("union_tag"):
            told = (
                "is missing" if problem["type"] == "union_tag_not_found" else f"{problem['input']['name']!r} is unknown"
            )
            problems.append(f"task.name {told}; give one of {', '.join(TASKS)}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
            problems.append(f"{key}: {message}{given}" if path else message)
    return "; ".join(problems)
