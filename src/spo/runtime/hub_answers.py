"""Tell refusals of the Hugging Face hub from failures that may pass by themselves."""

from json import JSONDecodeError

from spo.runtime.messages import causes

LATER = (408, 425, 429)  # of the 4xx, those that pass by themselves
LOG_IN = "log in with `hf auth login` or HF_TOKEN"


def refusal(repository: str, revision: str | None, error: BaseException) -> str | None:
    """What the hub refused, and what to do about it; None if the error is no refusal of the hub.

    Args:
        repository: OWNER/NAME, and for a data set `datasets/` before it, as in the hub's addresses.
        error: of the hub's client, or of a loader that calls it.
    """
    from huggingface_hub import constants, errors

    refused = next((e for e in causes(error) if 400 <= (_status(e) or 0) < 500), None)
    status = _status(refused) if refused else None
    if status is None or status in LATER:
        return None
    page = f"{constants.ENDPOINT}/{repository}"
    match refused:
        case errors.GatedRepoError():
            return f"gated on the hub: accept its conditions at {page}, then {LOG_IN}"
        case errors.RevisionNotFoundError():
            return f"the hub has no revision {revision or 'main'!r} of {repository}: see {page}"
        case errors.EntryNotFoundError():
            return f"the hub has no such file in {repository}: see {page}/tree/{revision or 'main'}"
        case errors.RepositoryNotFoundError():
            return f"the hub has no repository {repository}, or it is private: correct the name, or {LOG_IN}"
    if status == 401:
        return f"the hub does not authorise the request for {repository} (401): {LOG_IN}"
    why = "forbids access to" if status == 403 else "refuses the request for"
    return f"the hub {why} {repository} ({status}): check the name, and the permissions of the token"


def state(error: BaseException) -> str:
    """The reason of a failure after which a later request may succeed."""
    status = next((status for e in causes(error) if (status := _status(e))), None)
    if status == 429:
        return "answers 429 (too many requests): try again later"
    if status is not None:
        return f"answers {status}: try again later"
    if any(isinstance(e, JSONDecodeError) for e in causes(error)):
        return "does not answer; a proxy or a login page does instead"
    return f"cannot be reached ({type(error).__name__})"


def _status(error: BaseException | None) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
