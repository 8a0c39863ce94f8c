"""The settings of every task. Frozen, unknown keys refused; `config.RunConfig` holds one of them."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

MAX_P = 1000

Fraction = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Frozen, no unknown keys, no NaN or infinity, no silent conversions between kinds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class ModularAdditionConfig(Settings):
    """(a, b, =) -> (a + b) mod p. `split` says what stays on one side of train and test."""

    name: Literal["modular-addition"]
    p: PositiveInt
    train_fraction: Fraction
    split: Literal["unordered", "ordered"]

    @model_validator(mode="after")
    def _p_is_usable(self) -> Self:
        if self.p < 5 or any(self.p % k == 0 for k in range(2, int(self.p**0.5) + 1)):
            # An even p has a Nyquist row and a composite p has frequencies that do not tell all
            # residues apart; the Fourier measures assume neither.
            raise ValueError(f"p must be a prime of at least 5, got {self.p}; try {_next_prime(self.p)}")
        if self.p > MAX_P:
            raise ValueError(f"p must be at most {MAX_P}, as all p^2 pairs are used in every step, got {self.p}")
        return self


class MechanismRates(Settings):
    """How often each mechanism of the planted language begins, as probabilities at a position that is free.

    The rest is the bigram chain. repeat_length: the shortest and the longest segment that is copied.
    """

    ngram: Rate
    repeat: Rate
    open: Rate
    close: Rate
    skip_open: Rate
    skip_close: Rate
    repeat_length: tuple[PositiveInt, PositiveInt]

    @model_validator(mode="after")
    def _rates_fit(self) -> Self:
        total = self.ngram + self.repeat + self.open + self.close + self.skip_open + self.skip_close
        if total > 1:
            raise ValueError(f"the rates are probabilities of one draw and must sum to at most 1, got {total:g}")
        if self.repeat_length[0] > self.repeat_length[1]:
            raise ValueError(f"repeat_length must be (shortest, longest), got {self.repeat_length}")
        return self


class PlantedLanguageConfig(Settings):
    """A language with planted bigrams, n-grams, skip n-grams, brackets and repeats; see its task module.

    distributions: other rates by name, for data refinement, with n_refined rows each.
    """

    name: Literal["planted-language"]
    n_ctx: Annotated[int, Field(ge=8)]
    n_train: PositiveInt
    n_test: PositiveInt
    n_refined: PositiveInt
    n_plain: Annotated[int, Field(ge=8)]
    n_brackets: Annotated[int, Field(ge=1, le=4)]
    n_skips: PositiveInt
    n_ngrams: PositiveInt
    ngram_length: Annotated[int, Field(ge=3)]
    n_successors: PositiveInt
    noise: Rate
    rates: MechanismRates
    distributions: dict[str, MechanismRates]

    @model_validator(mode="after")
    def _tables_fit(self) -> Self:
        if self.n_successors > self.n_plain or self.n_skips > self.n_plain or self.ngram_length > self.n_plain:
            raise ValueError("n_successors, n_skips and ngram_length must not exceed n_plain")
        # Neighbours occur in one n-gram only; beyond half of all pairs, drawing such n-grams takes for ever.
        if self.n_ngrams * (self.ngram_length - 1) > self.n_plain * (self.n_plain - 1) // 2:
            raise ValueError(f"{self.n_ngrams} n-grams need more distinct pairs than {self.n_plain} plain tokens give")
        longest = max(rates.repeat_length[1] for rates in (self.rates, *self.distributions.values()))
        if longest >= self.n_ctx:
            raise ValueError(f"repeat_length {longest} does not fit n_ctx {self.n_ctx}")
        return self


TaskConfig = Annotated[ModularAdditionConfig | PlantedLanguageConfig, Field(discriminator="name")]


def _next_prime(n: int) -> int:
    candidate = max(n, 5)
    while any(candidate % k == 0 for k in range(2, int(candidate**0.5) + 1)):
        candidate += 1
    return candidate
