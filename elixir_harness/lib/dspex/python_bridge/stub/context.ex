defmodule DSPex.PythonBridge.Stub.Context do
  @moduledoc false
  # What the process that runs an answer's function knows of its run, for the function to send chunks and to call tools.
  # It sends the stub, whose process passes it on if the call is still there:
  #
  #   * `{:chunk, id, frame}`
  #   * `{:tool_call, id, {pid, call_id}, frame}`, which is answered with `{call_id, {:ok, term} | {:error, text}}`

  alias DSPex.PythonBridge.Calls.Request
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Stub.{Definition, Reply}

  # Of a run without LM calls.
  @meta %{
    "queue_ms" => 0.0,
    "wait_ms" => 0.0,
    "lm_usage" => %{},
    "lm_calls" => 0,
    "cache_hits" => 0,
    "finish_reasons" => [],
    "fallbacks" => 0,
    "cost_usd" => 0.0
  }
  # Parts of it that are there only if they are asked for.
  @parts ["history", "lm_events"]

  @enforce_keys [:server, :stub, :id, :program, :fields, :stream?, :meta, :lineage]
  defstruct @enforce_keys ++ [deadline: :infinity, timeout: :infinity, began: 0]

  @typedoc """
  `server`, `stub`: the stub's process and name. `id`: of the call. `fields`: those of the program, if its definition is
  known. `meta`: nil if the reply has none, else which of the longer parts it has (`"history"`, `"lm_events"`). `lineage`:
  see `DSPex.PythonBridge.Stub.Answers.lineage/1`.
  """
  @type t :: %__MODULE__{
          server: pid(),
          stub: atom(),
          id: pos_integer(),
          program: String.t(),
          fields: Definition.fields() | nil,
          stream?: boolean(),
          meta: [String.t()] | nil,
          lineage: [pid()],
          deadline: Deadline.t(),
          timeout: timeout(),
          began: integer()
        }

  @doc "Makes the calling process one that runs answers."
  @spec enter(t()) :: :ok
  def enter(run) do
    # By these, mocks and repositories that an answer uses find their owner.
    Process.put(:"$callers", run.lineage)
    Process.put(__MODULE__, run)
    :ok
  end

  @doc "Whether the function that the calling process runs has sent a chunk."
  @spec chunks?() :: boolean()
  def chunks?, do: Process.get({__MODULE__, :chunks?}, false)

  @doc "Sends a chunk, if the call is a stream."
  @spec stream(t(), map()) :: :ok
  def stream(run, chunk) do
    if run.stream?, do: send(run.server, {:chunk, run.id, Reply.chunk(run.id, chunk)})
    :ok
  end

  @doc "What of its `meta` a request asks for."
  @spec wishes(map()) :: [String.t()] | nil
  def wishes(request) do
    case Enum.filter(@parts, &(request[&1] == true)) do
      [] -> if request["meta"] == true, do: []
      parts -> parts
    end
  end

  @doc "The reply of a run that has this result."
  @spec reply(t(), Reply.result()) :: Request.reply()
  def reply(%__MODULE__{meta: nil} = run, result), do: Reply.new(run.id, result, nil)

  def reply(run, {:ok, outputs, own}),
    do: Reply.new(run.id, {:ok, outputs, Map.drop(own, @parts -- run.meta)}, meta(run))

  def reply(run, {:error, error}) do
    own = Map.drop(error.meta || %{}, @parts -- run.meta)
    Reply.new(run.id, {:error, %{error | meta: own}}, meta(run))
  end

  defp meta(run) do
    Enum.into(run.meta, @meta, &{&1, []})
    |> Map.put("duration_ms", (System.monotonic_time(:microsecond) - run.began) / 1000)
  end

  ## In an answer's function

  @doc "Sends a chunk of the run that the calling process answers."
  @spec chunk(String.t(), String.t()) :: :ok
  def chunk(field, text) do
    run = current("chunk/2")
    Process.put({__MODULE__, :chunks?}, true)
    stream(run, %{"field" => field, "chunk" => text})
  end

  @doc "Sends the present step of the run that the calling process answers."
  @spec status(String.t()) :: :ok
  def status(text), do: stream(current("status/1"), %{"status" => text})

  @doc "Calls a tool of the caller, and waits for its result."
  @spec call_tool(String.t(), map()) :: {:ok, term()} | {:error, String.t()}
  def call_tool(name, args) do
    run = current("call_tool/2")
    call_id = System.unique_integer([:positive])
    frame = Reply.tool_call(run.id, call_id, name, args)
    send(run.server, {:tool_call, run.id, {self(), call_id}, frame})

    receive do
      {^call_id, result} -> result
    end
  end

  defp current(function) do
    Process.get(__MODULE__) ||
      raise ArgumentError, "Stub.#{function}: only for the process that runs an answer's function"
  end
end
