//! What can go wrong, what is said about it, and the exit codes.

use std::error::Error;

use tonic::Code;
use tonic_types::StatusExt;
use wallaby_model::flow::FlowFileError;

use crate::server::chain;

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
        if let Some(cause) = broken_by(status) {
            // TLS lets a client in first, and then tells it that its certificate is missing.
            return if cause.contains(CERTIFICATE_ASKED) {
                Failure::NotPermitted(format!("{server} asks for a certificate: give --client-cert and --client-key"))
            } else {
                Failure::unreachable(
                    server,
                    &format!("{cause}; what was asked for may have been done if that broke a request"),
                )
            };
        }
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

/// How rustls names the alert of a server that asks for a client's certificate and got none.
const CERTIFICATE_ASKED: &str = "CertificateRequired";

/// What broke the connection under a request, with its causes; none when the request was answered, or its time was over.
fn broken_by(status: &tonic::Status) -> Option<String> {
    let transport = status.source()?.downcast_ref::<tonic::transport::Error>()?;
    let mut causes = std::iter::successors(transport.source(), |&cause| cause.source());
    if causes.any(|cause| cause.is::<tonic::TimeoutExpired>()) {
        return None;
    }
    Some(chain(transport))
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

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    const SERVER: &str = "http://127.0.0.1:7117";

    /// Every code that a server can answer with.
    fn codes() -> impl Iterator<Item = Code> {
        (1..=16).map(Code::from_i32)
    }

    #[test]
    fn an_answer_of_ours_ends_with_the_exit_code_of_its_kind() {
        for code in codes() {
            let details =
                ErrorDetails::with_error_info("A_REASON", "wallaby", [("flow".to_owned(), "shop".to_owned())]);
            let failure = Failure::from_status(&tonic::Status::with_error_details(code, "what to do", details), SERVER);
            let wanted = match code {
                Code::InvalidArgument => 2,
                Code::Unavailable => 4,
                Code::PermissionDenied | Code::Unauthenticated => 5,
                Code::DeadlineExceeded => 6,
                _ => 1,
            };
            assert_eq!(failure.exit_code(), wanted, "{code:?}: {failure:?}");
            assert_eq!(failure.text().as_deref(), Some("error: what to do [A_REASON]"), "{code:?}");
        }
    }

    #[test]
    fn an_answer_of_somebody_else_ends_with_the_exit_code_of_its_kind() {
        for code in codes() {
            let failure = Failure::from_status(&tonic::Status::new(code, "said"), SERVER);
            let (wanted, hint) = match code {
                Code::Unavailable => (4, "WALLABY_SERVER"),
                Code::PermissionDenied | Code::Unauthenticated => (5, "--client-cert"),
                Code::DeadlineExceeded | Code::Cancelled => (6, "--timeout"),
                Code::Unimplemented => (1, "--server"),
                _ => (1, "said"),
            };
            let text = failure.text().unwrap_or_default();
            assert_eq!(failure.exit_code(), wanted, "{code:?}: {failure:?}");
            assert!(text.contains(SERVER) && text.contains(hint), "{code:?}: {text}");
        }
    }

    #[test]
    fn what_ends_without_a_word_has_its_exit_code_too() {
        for (failure, wanted) in [(Failure::Findings, 3), (Failure::Interrupted, 130), (Failure::OutputClosed, 0)] {
            assert_eq!((failure.exit_code(), failure.text()), (wanted, None));
        }
    }
}
