"""Configuration: the environment over a file over the defaults.

``FLASHCORE_CONFIG`` names a YAML file or a preset (``configs/`` of the project), ``FLASHCORE_<FIELD>`` sets one field.
Every mistake is a :class:`ConfigError` of one line that names the value, where it stands and what is allowed.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "FLASHCORE_"
FILE_VARIABLE = "FLASHCORE_CONFIG"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line."""


class Config(BaseSettings):
    """Every setting. Build it with :func:`load`, which also checks for unknown variables and shortens errors."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    policy: Literal["exact", "window", "topk"] = Field("exact", description="which pages a decode step reads")
    variant: Literal["auto", "wgmma_sm90", "wmma_sm80", "cublaslt", "cpu"] = Field(
        "auto", description="kernel; auto: the best one for shape and device"
    )
    page_size: int = Field(64, ge=1, le=1024, description="tokens in a page, when the server is given no --page-size")
    share_prefixes: bool = Field(True, description="read pages that requests share once, where that is faster")
    deterministic: bool = Field(False, description="results do not depend on the rest of the batch")
    split_keys: int = Field(4096, ge=64, multiple_of=64, description="keys in a split in deterministic mode")
    sink_tokens: int = Field(128, ge=0, description="window, topk: tokens always read at the start of a request")
    recent_tokens: int = Field(512, ge=1, description="window, topk: tokens always read at the end of a request")
    budget_tokens: int = Field(4096, ge=1, description="topk: tokens read in all; shorter requests are read whole")
    budget_fraction: float | None = Field(
        None, ge=0, le=1, description="topk: fraction of a request read where that is more than budget_tokens"
    )
    summary_kind: Literal["mean_std", "min_max", "mean"] = Field(
        "mean_std", description="topk: what stands for a page's keys; mean takes half of the memory"
    )
    summary_dtype: Literal["auto", "fp8"] = Field("auto", description="topk: of the summaries; auto: as the KV cache")
    group_reduction: Literal["max", "mean", "logsumexp"] = Field(
        "max", description="topk: one score of a KV head's query heads"
    )
    reuse_layers: int = Field(1, ge=1, description="topk: layers in a row that read the pages the first one chose")
    dense_layers: int = Field(2, ge=0, description="topk: layers at the front that read everything")
    std_weight: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="topk: weight of |q|.std beside q.mean in a page's score (mean_std)"
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="topk: share of the estimated softmax whose pages suffice within the budget; 1: off",
    )
    cublaslt_ws_mb: int = Field(32, ge=0, le=4096, description="MiB of cuBLASLt workspace")
    cublaslt_scores: Literal["auto", "fp16", "fp32"] = Field(
        "auto", description="what variant cublaslt keeps scores in; auto: fp32 for fp16 inputs, fp16 for bf16"
    )
    cpu_threads: int = Field(0, ge=0, le=4096, description="threads of the cpu variant; 0: all cores")
    check: bool = Field(False, description="validate page tables before each plan (synchronises)")
    metrics: bool | Literal["auto"] = Field("auto", description="Prometheus metrics; auto: as the server's own")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, ConfigFile(settings_cls)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's true and false where they are not asked for; pydantic would take them for 1 and 0."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("true or false")
        return value

    @model_validator(mode="after")
    def _budget_exceeds_what_is_forced(self) -> Config:
        forced = self.sink_tokens + self.recent_tokens
        if self.policy == "topk" and self.budget_tokens <= forced:
            raise ValueError(
                f"policy topk: budget_tokens must exceed sink_tokens + recent_tokens = {self.sink_tokens} + "
                f"{self.recent_tokens} = {forced}, got {self.budget_tokens}"
            )
        return self

    def pages(self, page_size: int) -> tuple[int, int, int]:
        """``(sink, recent, budget)`` in pages of ``page_size`` tokens, rounded up, with at least one page to choose."""
        sink, recent, budget = (
            -(-tokens // page_size) for tokens in (self.sink_tokens, self.recent_tokens, self.budget_tokens)
        )
        return sink, recent, max(budget, sink + recent + 1)


class ConfigFile(PydanticBaseSettingsSource):
    """The file or preset that ``FLASHCORE_CONFIG`` names; ``origin`` says which one, for people."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls)
        self.path, self.origin = find_file(os.environ.get(FILE_VARIABLE, ""))

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        if self.path is None:
            return {}
        try:
            values = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{self.origin}: cannot be read as YAML: {' '.join(str(error).split())}") from None
        if values is None:
            return {}
        if not isinstance(values, dict):
            raise ConfigError(f"{self.origin}: expected `field: value` lines, got a YAML {type(values).__name__}")
        for key in values:
            if key not in Config.model_fields:
                raise ConfigError(f"{self.origin}: unknown key {key!r}{_hint(str(key), Config.model_fields)}")
        return values


def presets() -> dict[str, Path]:
    """The presets by name: of the installed package, or of the checkout it is developed in."""
    here = Path(__file__)
    for folder in (here.with_name("configs"), here.resolve().parents[1] / "configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def find_file(name: str) -> tuple[Path | None, str]:
    """The file behind a value of ``FLASHCORE_CONFIG``, and what to call it; ``(None, "")`` for an empty value.

    Raises:
        ConfigError: there is no such preset or file.
    """
    if not name:
        return None, ""
    known = presets()
    if name in known:
        return known[name], f"preset {name}"
    path = Path(name).expanduser()
    if path.is_file():
        return path, f"file {path}"
    raise ConfigError(f"{FILE_VARIABLE}={name}: neither a file nor a preset{_hint(name, known, what='presets')}")


def load(**overrides: Any) -> Config:
    """The configuration in force; ``overrides`` win over the environment.

    Raises:
        ConfigError: an unknown variable or key, a value that is not allowed, a missing file.
    """
    variables = {PREFIX + field.upper() for field in Config.model_fields} | {FILE_VARIABLE}
    for name in os.environ:
        if name.startswith(PREFIX) and name not in variables:
            raise ConfigError(f"unknown environment variable {name}{_hint(name, variables)}")
    try:
        return Config(**overrides)
    except ValidationError as error:
        raise ConfigError(_first_error(error, overrides)) from None


def sources(overrides: Iterable[str] = ()) -> dict[str, str]:
    """Where each field's value comes from: ``argument``, ``env VAR``, ``preset NAME``, ``file PATH`` or ``default``."""
    environment = EnvSettingsSource(Config)()
    file = ConfigFile(Config)
    in_file = file()

    def source(field: str) -> str:
        if field in overrides:
            return "argument"
        if field in environment:
            return f"env {PREFIX}{field.upper()}"
        return file.origin if field in in_file else "default"

    return {field: source(field) for field in Config.model_fields}


def _first_error(error: ValidationError, overrides: dict[str, Any]) -> str:
    """One line for the first mistake: where it stands, what is allowed, what came."""
    detail = error.errors()[0]
    if not detail["loc"]:
        return str(detail["ctx"]["error"])  # raised by a validator over several fields
    field = str(detail["loc"][0])
    if field not in Config.model_fields:
        return f"argument: unknown field {field!r}{_hint(field, Config.model_fields)}"
    source = sources(overrides)[field].removeprefix("env ")
    where = source if source.startswith(PREFIX) else f"{source}: {field}"
    return f"{where}: expected {allowed(field)}, got {detail['input']!r}"


def allowed(field: str) -> str:
    """What a field accepts, in words, from the model's own schema."""
    return _words(Config.model_json_schema()["properties"][field])


def _words(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_words(part) for part in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if schema["type"] == "null":
        return "null"
    if schema["type"] == "boolean":
        return "true or false"
    text = {"integer": "a whole number", "number": "a number"}[schema["type"]]
    limits = {
        "minimum": "at least",
        "exclusiveMinimum": "more than",
        "maximum": "at most",
        "multipleOf": "a multiple of",
    }
    bounds = [f"{words} {schema[key]:g}" for key, words in limits.items() if key in schema]
    return ", ".join([text, *bounds])


def _hint(name: str, known: Iterable[str], what: str = "allowed") -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    guess = f"; did you mean {close[0]}?" if close else ""
    return f"{guess} ({what}: {', '.join(names)})"
