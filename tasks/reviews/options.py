"""What the module `reviews` asks of a task, as `task.data.reviews`."""

from pydantic import Field

from core.schema import NonEmpty, Section, Text


class Options(Section):
    title: NonEmpty = Field(description="of what the reviews are of")
    kind: Text = Field(
        "", description="what a sentence calls it: film, restaurant, phone, ...; empty: what most reviews call it"
    )
    aspects: dict[str, list[Text]] = Field(
        {}, description="name: words for it, beside those of domains.yaml and of the reviews; [] leaves one of them out"
    )
