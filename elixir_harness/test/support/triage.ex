defmodule DSPex.Test.Address do
  @moduledoc "A struct that declares its fields, as an application's."
  defstruct [:street, :city, note: "none"]

  @type t :: %__MODULE__{street: String.t() | nil, city: String.t() | nil, note: String.t()}

  @spec __dspex__(:fields) :: keyword()
  def __dspex__(:fields), do: [street: :string, city: {:string, "without the postal code"}]
end

defmodule DSPex.Test.Triage do
  @moduledoc "A program as a module, as an application's."
  use DSPex.PythonBridge.Program,
    program_type: "chain_of_thought",
    signature: [
      inputs: [ticket: :string, sender: {:optional, DSPex.Test.Address}],
      outputs: [
        team: {:enum, ["billing", "support"]},
        size: {{:enum, [:small, :large]}, "of the problem"},
        urgent: :boolean,
        due: :date,
        reply_to: DSPex.Test.Address,
        items: {:list, %{sku: :string, count: {:optional, :integer}}},
        phone: {:optional, :string}
      ]
    ],
    instructions: "Route the ticket."
end
