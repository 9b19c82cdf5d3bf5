defmodule Oban.Job do
  @moduledoc "In the place of Oban's, which cannot be had here."
  defstruct [:id, args: %{}, attempt: 1, max_attempts: 20]
end

defmodule Oban.Worker do
  @moduledoc "In the place of Oban's: its callbacks, and the checks of its options that matter here."

  @callback perform(%Oban.Job{}) ::
              :ok
              | {:ok, term()}
              | {:error, term()}
              | {:cancel, term()}
              | {:snooze, pos_integer()}
  @callback timeout(%Oban.Job{}) :: pos_integer() | :infinity

  @known [:queue, :max_attempts, :unique, :priority, :tags, :replace]

  defmacro __using__(opts) do
    [] = Keyword.keys(opts) -- @known

    quote do
      @behaviour Oban.Worker
      @impl Oban.Worker
      def timeout(_job), do: :infinity
      defoverridable timeout: 1
    end
  end
end
