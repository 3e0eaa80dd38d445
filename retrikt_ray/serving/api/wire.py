"""The types of the API: what requests may hold, and what answers hold.

Shapes follow those of Hugging Face's Inference API and of text-embeddings-inference (TEI), so that their clients can be used as they are.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

RUN_HEADER = "serve_multiplexed_model_id"  # Ray Serve's; it, too, takes it with hyphens, which some proxies insist on
INTERRUPTED = "interrupted"  # code of a 503 where nobody knows whether the edit that was asked for was made

# what requests hold

ITEM = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"text": {"type": "string"}, "text_pair": {"type": "string"}},
            "required": ["text"],
            "additionalProperties": False,
        },
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
    ]
}
# Checked by `texts_of_inputs`: pydantic's findings about a union name every branch and help nobody.
Inputs = Annotated[Any, WithJsonSchema({"anyOf": [*ITEM["anyOf"][:2], {"type": "array", "items": ITEM, "minItems": 1}]})]
Rows = Annotated[
    list[Any],
    WithJsonSchema(
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "id": {"type": "string"},
                    "text": {"type": "string"},
                    "text_pair": {"type": "string"},
                    "label": {"anyOf": [{"type": "string"}, {"type": "number"}]},
                    "teacher_probs": {"type": "array", "items": {"type": "number"}},
                },
                "required": ["text"],
                "additionalProperties": False,
            },
        }
    ),
]


# Either way of writing it is taken; two names that differ in case alone are too much for generators of clients.
Direction = Annotated[Literal["right", "Right"], WithJsonSchema({"type": "string", "enum": ["Right"]})]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Body(Strict):
    """Texts to be answered."""

    inputs: Inputs = Field(
        description='A text; in pair tasks {"text", "text_pair"} or ["text", "second text"]; or a list of such, which is answered by a list.'
    )
    truncate: bool | None = Field(
        None, strict=True, description="Cut texts that are longer than the server takes, instead of refusing them."
    )
    truncation_direction: Direction | None = Field(None, description="The end that is cut.")


class Parameters(Strict):
    """Parameters of Hugging Face's text-classification task."""

    top_k: int | None = Field(None, ge=1, strict=True, description="Labels per text; default all.")
    function_to_apply: Literal["softmax", "none"] | None = Field(
        None, description="none: log-probabilities in place of probabilities. In regression the score is the value either way."
    )


class PredictBody(Body):
    """What POST /predict and POST / take."""

    top_k: int | None = Field(None, ge=1, strict=True, description="Labels per text; default all.")
    raw_scores: bool | None = Field(None, strict=True, description="Log-probabilities in place of probabilities, as TEI has it.")
    parameters: Parameters | None = Field(
        None, description="Of the Inference API, whose answer to a single text is a list of one answer: [[{label, score}, ...]]."
    )
    options: dict[str, Any] | None = Field(None, description="Of the Inference API; means nothing here.")

    @property
    def most(self) -> int | None:
        """Labels per text."""
        return self.parameters.top_k if self.parameters and self.parameters.top_k else self.top_k

    @property
    def raw(self) -> bool:
        return bool(self.raw_scores or (self.parameters and self.parameters.function_to_apply == "none"))

    @property
    def nested(self) -> bool:
        """Whether one text is answered by a list of one answer."""
        return self.parameters is not None or self.options is not None


class EmbedBody(Body):
    """What POST /embed takes."""

    normalize: Literal[True] | None = Field(None, description="Vectors have unit length; there are no others.")


class RetrieveBody(Body):
    """What POST /retrieve takes."""

    k: int = Field(8, ge=1, le=100, strict=True, description="Rows of the store per text.")
    mode: Literal["dense", "lexical", "hybrid"] = Field(
        "dense", description="By the student's vectors, by shared words (BM25), or both, apart: {dense, lexical}."
    )
    label: str | None = Field(None, description="Only rows that the teacher gives this label.")
    source: str | None = Field(None, description="Only rows of this source: generated, corpus, task, unlabelled or added.")


class PutBody(Strict):
    """What PUT /knowledge takes."""

    rows: Rows = Field(
        description="Rows to be added, or put in place of those that have their ids. Without an id it follows from the text, "
        "without a label the teacher gives one."
    )


class DeleteBody(Strict):
    """What DELETE /knowledge takes."""

    ids: list[str] = Field(min_length=1, description="Ids of rows; all are deleted or none.")


class PreviewBody(Strict):
    """What POST /knowledge/preview takes."""

    rows: Rows = Field([], description="As for PUT.")
    ids: list[str] = Field([], description="As for DELETE.")
    inputs: Inputs = Field(description="Texts whose answers are compared, as for /predict.")


# what answers hold; the server writes them as they are, so these types are for the API's description and for clients


class Score(BaseModel):
    """A label and its probability; in regression LABEL_0 and the value."""

    label: str
    score: float


Scores = list[Score]  # best first


class Row(BaseModel):
    """A row of the knowledge, with the teacher's label."""

    id: str
    text: str
    text_pair: str | None
    source: str
    label: str
    score: float


class Without(Score):
    """The likeliest label where one row has no vote."""

    change: float = Field(description="Of the score of the label that is predicted with it.")


class Found(Row):
    """A row that was found for a text."""

    similarity: float | None = Field(None, description="Cosine of its vector and the text's; absent where it was found by its words.")
    bm25: float | None = Field(None, description="Absent where it was found by its vector.")


class Voter(Found):
    """A row that voted."""

    without: Without


class Sides(BaseModel):
    """Rows that were found by their vectors and by their words."""

    dense: list[Found]
    lexical: list[Found]


class Spoken(BaseModel):
    """A word or word pair of the text, and what it adds to the log-odds of the predicted label (to the value, in regression)."""

    ngram: str
    weight: float


class Explanation(BaseModel):
    """A prediction and what it rests on."""

    prediction: Scores
    told: str | None = Field(description="Id of the added row that is this text word for word: its label is the answer.")
    student: Scores = Field(description="The student's own answer.")
    votes: dict[str, Scores | None] = Field(description="What dense, lexical and ngrams say; null where nothing was found.")
    without: dict[str, Scores | None] = Field(description="The answer without each voice; null where nothing would be left.")
    neighbours: list[Voter]
    lexical_neighbours: list[Voter]
    ngrams: list[Spoken]
    mixture: dict[str, float | list[float]] = Field(
        description="Weights of the voices, how rows vote, and what class frequencies add to the log-odds (`prior`; empty: nothing)."
    )


class Listing(BaseModel):
    """Some rows of the knowledge, newest first."""

    version: str = Field(description="Of the knowledge: the release of the run, a point, and the number of edits.")
    total: int = Field(description="Rows that match.")
    rows: list[Row]


class Edited(BaseModel):
    """What an edit did."""

    version: str = Field(description="Of the knowledge after it.")
    ids: list[str] = Field(description="Of rows that were put.")
    before: list[dict[str, Any]] = Field(description="Rows that are gone; putting them back, and deleting what is new, undoes the edit.")


class Compared(BaseModel):
    """The answer to a text now, and as it would be."""

    changed: bool = Field(description="Whether the label differs; in regression, whether the value does.")
    before: Scores
    after: Scores


class Preview(BaseModel):
    """What an edit would do."""

    version: str
    answers: list[Compared]


class Problem(BaseModel):
    """The body of every error."""

    error: str = Field(description="What was found.")
    code: str = Field(description="The same as one word, for programs.")
    expected: str | None = None
    error_id: str | None = Field(None, description="With 500: the request's id, under which the server's log has the cause.")


class Info(BaseModel):
    """What is served."""

    model_config = ConfigDict(extra="allow")
    task: str
    problem: str
    labels: list[str]
    pair: bool
    version: str
    store: dict[str, int]
    release: str = Field(description="Tells what the stages of the run have made from what others have; versions begin with it.")
    refused: str | None = Field(description="Why the run that was last offered in its place was not taken over.")
    limits: dict[str, float]
