defmodule DSPex.PythonBridge.Bridge.Health do
  @moduledoc false
  # What a monitor's checks have found so far.

  @window 1_000

  # failures: misses in a row; doubted: how many of them were pings in doubt; missed: the OS pid of the peer that missed
  # them; response_times: the last ones, in ms, newest first.
  defstruct status: :unknown,
            failures: 0,
            doubted: 0,
            missed: nil,
            last_check: nil,
            checks: 0,
            answered: 0,
            response_times: []

  @type t :: %__MODULE__{
          status: :healthy | :unhealthy | :unknown,
          failures: non_neg_integer(),
          doubted: non_neg_integer(),
          missed: pos_integer() | nil,
          last_check: DateTime.t() | nil,
          checks: non_neg_integer(),
          answered: non_neg_integer(),
          response_times: [float()]
        }

  @doc "Counts a check, whatever it found."
  @spec checked(t()) :: t()
  def checked(%__MODULE__{} = health),
    do: %{health | last_check: DateTime.utc_now(), checks: health.checks + 1}

  @doc "A ping was answered after so many ms."
  @spec answered(t(), float()) :: t()
  def answered(%__MODULE__{} = health, ms) do
    times = Enum.take([ms | health.response_times], @window)
    health = %{recovered(health) | status: :healthy, response_times: times}
    %{health | answered: health.answered + 1}
  end

  @doc "The peer of this OS pid missed a ping, which was in doubt or not. Misses of another peer are not counted to it."
  @spec missed(t(), pos_integer() | nil, boolean()) :: t()
  def missed(%__MODULE__{missed: os_pid} = health, os_pid, in_doubt?) do
    doubted = if in_doubt?, do: health.doubted + 1, else: health.doubted
    %{unhealthy(health) | failures: health.failures + 1, doubted: doubted}
  end

  def missed(%__MODULE__{} = health, os_pid, in_doubt?),
    do: missed(%{recovered(health) | missed: os_pid}, os_pid, in_doubt?)

  @doc "A check failed in a way that does not count towards a restart."
  @spec unhealthy(t()) :: t()
  def unhealthy(%__MODULE__{} = health), do: %{health | status: :unhealthy}

  @doc "The misses so far no longer count."
  @spec recovered(t()) :: t()
  def recovered(%__MODULE__{} = health), do: %{health | failures: 0, doubted: 0}

  @doc "The misses of pings in doubt no longer count."
  @spec heard(t()) :: t()
  def heard(%__MODULE__{} = health),
    do: %{health | failures: health.failures - health.doubted, doubted: 0}

  @doc "The result of `DSPex.PythonBridge.Monitor.get_health_status/1`."
  @spec report(t()) :: map()
  def report(%__MODULE__{} = health) do
    sorted = health.response_times |> Enum.sort() |> List.to_tuple()

    health
    |> Map.take([:status, :failures, :last_check, :checks])
    |> Map.merge(%{
      success_rate: if(health.checks > 0, do: health.answered / health.checks, else: 0.0),
      response_ms: %{
        last: List.first(health.response_times),
        p50: percentile(sorted, 50),
        p99: percentile(sorted, 99)
      }
    })
  end

  # Nearest rank.
  defp percentile({}, _percent), do: nil
  defp percentile(sorted, percent), do: elem(sorted, ceil(tuple_size(sorted) * percent / 100) - 1)
end
