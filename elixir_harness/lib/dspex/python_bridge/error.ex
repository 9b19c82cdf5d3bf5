defmodule DSPex.PythonBridge.Error do
  @moduledoc """
  The error of a request.

  `type` is for code, `message` for people. `retryable` says whether the same request may succeed later.

  Types are the `error_type` names of the protocol, some of which also come from the Elixir side (a timeout, for
  example), and two that only come from there: `:python_process_died` and `:bridge_not_running`.

  `meta` is that of the error reply, with string keys, as `DSPex.PythonBridge.Bridge.request/4` describes it: a failed run
  has asked an LM, too. It is nil if the peer has sent none. An inspection of the error shows how many LM calls
  `meta["history"]` has, and not their contents.
  """

  @types ~w(invalid_json invalid_request invalid_args unknown_command frame_too_large program_not_found
            lm_not_configured lm_error output_invalid tool_error timeout cancelled overloaded budget_spent
            journal_mismatch not_allowed internal
            python_process_died bridge_not_running)a
  # A fixed table, so that no string from outside becomes a new atom.
  @by_name Map.new(@types, &{Atom.to_string(&1), &1})

  @local_messages %{
    timeout: "no reply within the timeout",
    overloaded: "too many calls wait for the peer; try again later",
    python_process_died: "the Python process died before it replied",
    bridge_not_running: "the bridge is not running"
  }

  @not_started "the Python process does not start: "

  @retryable [:overloaded, :python_process_died, :bridge_not_running]

  @enforce_keys [:type, :message]
  defexception [:type, :message, :meta, retryable: false]

  @type type :: unquote(Enum.reduce(@types, &{:|, [], [&1, &2]}))

  @type t :: %__MODULE__{
          type: type(),
          message: String.t(),
          retryable: boolean(),
          meta: %{String.t() => term()} | nil
        }

  @doc """
  An error of the Elixir side, with the usual text of its type.

      iex> DSPex.PythonBridge.Error.new(:timeout)
      %DSPex.PythonBridge.Error{type: :timeout, message: "no reply within the timeout"}
  """
  @spec new(:timeout | :overloaded | :python_process_died | :bridge_not_running) :: t()
  def new(type), do: new(type, Map.fetch!(@local_messages, type))

  @doc """
  An error of the Elixir side with its own message.

      iex> DSPex.PythonBridge.Error.new(:overloaded, "1 calls are running and 0 are waiting").retryable
      true
  """
  @spec new(type(), String.t()) :: t()
  def new(type, message),
    do: %__MODULE__{type: type, message: message, retryable: type in @retryable}

  @doc """
  The error of a bridge or a pool that is not running, whose text names it.

      iex> DSPex.PythonBridge.Error.not_running(:bridge, MyApp.Bridge).message
      "the bridge MyApp.Bridge is not running"
  """
  @spec not_running(:bridge | :pool, term()) :: t()
  def not_running(kind, server) do
    name = inspect(server, limit: 10, printable_limit: 100)
    new(:bridge_not_running, "the #{kind} #{name} is not running")
  end

  @doc """
  The error of a bridge whose Python does not start, with the reason.

      iex> DSPex.PythonBridge.Error.not_started("exit status 1").message
      "the Python process does not start: exit status 1"
  """
  @spec not_started(String.t()) :: t()
  def not_started(reason), do: new(:python_process_died, @not_started <> reason)

  @doc """
  The error of a reply: its `error_type` as a string, its message, and `retryable` and `meta` if it has them. An unknown
  type becomes `:internal`.

      iex> DSPex.PythonBridge.Error.from_peer("lm_error", "rate limit", true).retryable
      true
      iex> DSPex.PythonBridge.Error.from_peer("of_tomorrow", "?", nil).type
      :internal
      iex> DSPex.PythonBridge.Error.from_peer("output_invalid", "?", nil, %{"lm_calls" => 2}).meta
      %{"lm_calls" => 2}
  """
  @spec from_peer(term(), String.t(), term(), term()) :: t()
  def from_peer(error_type, message, retryable, meta \\ nil) do
    error = new(Map.get(@by_name, error_type, :internal), message)
    error = if is_boolean(retryable), do: %{error | retryable: retryable}, else: error
    if is_map(meta), do: %{error | meta: meta}, else: error
  end

  @doc """
  The reason that `DSPex.PythonBridge.Bridge.call/4` returns for this error: an atom if code can act on it, else the
  text.

      iex> DSPex.PythonBridge.Error.to_call_reason(DSPex.PythonBridge.Error.new(:timeout))
      :timeout
  """
  @spec to_call_reason(t()) ::
          :timeout | :overloaded | :python_process_died | :bridge_not_running | String.t()
  # Nothing that code does helps; people need the reason.
  def to_call_reason(%__MODULE__{message: @not_started <> _reason = text}), do: text

  def to_call_reason(%__MODULE__{type: type, message: message}) do
    if is_map_key(@local_messages, type), do: type, else: message
  end

  @impl Exception
  @spec message(t()) :: String.t()
  def message(%__MODULE__{message: message}), do: message

  # The history has prompts and answers, and errors are inspected into logs.
  defimpl Inspect do
    def inspect(%{meta: %{"history" => history} = meta} = error, opts) do
      shown =
        if is_list(history), do: "(#{length(history)} entries, not shown)", else: "(not shown)"

      Inspect.Any.inspect(%{error | meta: %{meta | "history" => shown}}, opts)
    end

    def inspect(error, opts), do: Inspect.Any.inspect(error, opts)
  end
end
