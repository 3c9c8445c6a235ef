"""What the module `reviews` asks of a task, as `task.data.reviews`."""

from pydantic import Field

from core.schema import NonEmpty, Section, Text


class Options(Section):
    title: NonEmpty = Field(description="of the film that the reviews are of")
    kind: Text = Field("film", description="what a sentence calls it: film, series, show, documentary")
    aspects: dict[str, list[Text]] = Field(
        {}, description="name: words for it, beside those of film_words.yaml; [] leaves one of them out"
    )
