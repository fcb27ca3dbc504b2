//! What can go wrong, what is said about it, and the exit codes.

use tonic::Code;
use tonic_types::StatusExt;
use wallaby_model::flow::FlowFileError;

/// Usage, or an invalid file.
pub const EXIT_USAGE: u8 = 2;

/// Why a command did not do what was asked.
#[derive(Debug)]
pub enum Failure {
    /// It was tried and did not work.
    Failed(String),
    /// The words or the file are wrong.
    Invalid(String),
    /// Doctor has findings that must be mended, diff or verify has differences; they are printed already.
    Findings,
    /// Nobody answers.
    Unreachable(String),
    /// Somebody answers, and says no.
    NotPermitted(String),
    /// It did not happen in time.
    TimedOut(String),
    /// Ctrl-C.
    Interrupted,
    /// Whoever reads our output has gone away (`wallaby get … | head`): nothing to say and nothing wrong.
    OutputClosed,
}

impl Failure {
    /// The exit code, as api.md lists them.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Failed(_) => 1,
            Failure::Invalid(_) => EXIT_USAGE,
            Failure::Findings => 3,
            Failure::Unreachable(_) => 4,
            Failure::NotPermitted(_) => 5,
            Failure::TimedOut(_) => 6,
            Failure::Interrupted => 130,
            Failure::OutputClosed => 0,
        }
    }

    /// What goes to standard error.
    pub fn text(&self) -> Option<String> {
        match self {
            Failure::Failed(text)
            | Failure::Invalid(text)
            | Failure::Unreachable(text)
            | Failure::NotPermitted(text)
            | Failure::TimedOut(text) => Some(format!("error: {text}")),
            Failure::Findings | Failure::Interrupted | Failure::OutputClosed => None,
        }
    }

    /// What the server's answer means. `server` is the address, for messages.
    pub fn from_status(status: &tonic::Status, server: &str) -> Failure {
        let info = status.get_details_error_info();
        let Some(info) = info else { return Failure::without_info(status, server) };
        let text = format!("{} [{}]", status.message(), info.reason);
        match status.code() {
            Code::InvalidArgument => Failure::Invalid(text),
            Code::Unavailable => Failure::Unreachable(text),
            Code::PermissionDenied | Code::Unauthenticated => Failure::NotPermitted(text),
            Code::DeadlineExceeded => Failure::TimedOut(text),
            _ => Failure::Failed(text),
        }
    }

    /// An answer without our details: from the transport, from a proxy, or from something that is no controller.
    fn without_info(status: &tonic::Status, server: &str) -> Failure {
        let said = status.message();
        match status.code() {
            Code::Unavailable => Failure::unreachable(server, said),
            Code::DeadlineExceeded | Code::Cancelled => {
                Failure::TimedOut(format!("no answer from the controller at {server} in time; raise --timeout"))
            }
            Code::PermissionDenied | Code::Unauthenticated => {
                Failure::NotPermitted(format!("{server} refused: {said}. Check --client-cert and --client-key"))
            }
            Code::Unimplemented => Failure::Failed(format!(
                "{server} does not know this request: it is no WALlaby controller, or one of another version. Check --server"
            )),
            code => Failure::Failed(format!("{server} answered with {code:?}: {said}")),
        }
    }

    /// Nobody answers at this address.
    pub fn unreachable(server: &str, cause: &str) -> Failure {
        Failure::Unreachable(format!(
            "no controller answers at {server} ({cause}). Start one (`wallaby-controller`), or name another with --server or WALLABY_SERVER"
        ))
    }
}

impl From<FlowFileError> for Failure {
    fn from(error: FlowFileError) -> Failure {
        Failure::Invalid(error.to_string())
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Failure {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Failure::OutputClosed,
            _ => Failure::Failed(format!("cannot write the output: {error}")),
        }
    }
}
