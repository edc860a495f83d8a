"""What every stand-in for a `types.Backbone` shares."""

from spo.types import Budget, Conditioning


class Whole:
    """Everything fits in one call."""

    budget = Budget()

    def encode_prompts(self, prompts) -> Conditioning:
        raise AssertionError

    def empty_prompt(self) -> Conditioning:
        return self.encode_prompts([""])

    def rest(self) -> None:
        """The UNet stays where it is."""
