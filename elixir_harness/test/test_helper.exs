# Nothing waits for it to pass: it is for a machine that has much else to do.
ExUnit.start(capture_log: true, assert_receive_timeout: 5_000)
